"""Pretraining: shards of encoded clips -> a world model. Reads `data_pipeline`, is read by `finetune`."""
