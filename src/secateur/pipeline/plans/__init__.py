"""What a request will come to, before a weight is written."""
