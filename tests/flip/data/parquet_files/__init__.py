"""Parquet files of other writers, and the program that writes them."""
