"""The data's way to the loops: problems, TFDS data sets, examples, batches."""
