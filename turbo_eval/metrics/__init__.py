"""One module a metric: each turns a job into a record."""
