"""A version as one HTML page that is read offline: what it holds, how it was made, pictures and samples."""
