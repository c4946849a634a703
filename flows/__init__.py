"""What happens: one file per flow, the pipeline that chains them, and the command line."""
