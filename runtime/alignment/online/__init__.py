"""On-policy methods: answers are drawn from the policy that is trained, scored, and learnt from at once."""
