"""Raw recordings -> WebDataset shards -> batches."""
