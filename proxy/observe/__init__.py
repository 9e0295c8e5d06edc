"""What operators see: metrics, logs, and the admin address that shows health. Never a secret."""
