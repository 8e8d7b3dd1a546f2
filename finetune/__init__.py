"""A world model -> a policy: record demonstrations, fine-tune a paradigm, measure it in the loop."""
