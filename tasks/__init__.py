"""Steps of flows: thin and repeatable; the only place that knows Prefect, runtime and storage."""
