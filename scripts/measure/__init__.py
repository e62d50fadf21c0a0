"""What is measured and shown of volumes and latents."""
