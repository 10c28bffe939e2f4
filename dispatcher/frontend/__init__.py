"""The OpenAI API over the queue: a skin over the SDK. It needs Kafka; Redis only to list models."""
