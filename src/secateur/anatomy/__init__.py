"""What a model is made of, as data: a short file a family, checked against the model; files and memory."""
