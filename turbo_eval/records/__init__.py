"""What was asked and what happened: cells, records, the folder that keeps them."""
