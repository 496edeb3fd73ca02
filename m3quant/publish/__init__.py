"""Put a converted checkpoint on the Hub, whole, licensed and verifiable."""
