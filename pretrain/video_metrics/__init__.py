"""How imagined video differs from the true one, besides squared errors: one metric per file."""
