"""What a run would do on devices that are not there."""
