"""The configuration of training, of the model and of sampling."""
