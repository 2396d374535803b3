"""What is sparse, what networks need, and plots of both."""
