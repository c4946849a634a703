"""S3D: drafts by the policy's own first and last layers, verified by all of them."""
