"""What is done with a trained network; never imports training/."""
