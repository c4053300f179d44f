"""`epd-ray score`: scores large sets of existing pictures with Ray Data, and stores the scores as Parquet files."""
