"""What a model is made of, as data: one short file a family, checked against the model; files against memory."""
