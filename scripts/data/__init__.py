"""Volumes on their way from files to patches; knows no network."""
