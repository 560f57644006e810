"""Fine-tuning a model on pictures, as whoever wants a concept back would do it."""
