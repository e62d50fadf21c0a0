"""What the JSON configs of the MAISI CT autoencoder bundle cannot say; one idea a module."""
