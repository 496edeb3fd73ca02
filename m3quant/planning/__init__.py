"""What an output will hold and cost, from headers and config.json alone. Torch-free."""
