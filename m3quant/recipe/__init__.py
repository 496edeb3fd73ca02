"""What a recipe says: schemes by role, and llm-compressor's YAML as another spelling of it. Torch-free."""
