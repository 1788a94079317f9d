"""What the speed benchmark is made of: the cases, who runs them, how they are timed, and how much memory they take."""
