"""What follows every step of an optimizer: the proximal step, the schedule, the freeze."""
