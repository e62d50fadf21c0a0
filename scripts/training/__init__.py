"""One engine for all trainings, and what each adds to it; never imports use/."""
