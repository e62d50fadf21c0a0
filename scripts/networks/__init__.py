"""Networks, their weights, and how they go over a whole volume; knows no data."""
