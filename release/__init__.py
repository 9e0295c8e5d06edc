"""What is released: how it is made and tried (`make dist`). Not part of the package."""
