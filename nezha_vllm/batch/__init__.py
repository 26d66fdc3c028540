"""Batch scoring: Parquet histories in, Parquet recommendations out, on one machine or a Ray cluster."""
