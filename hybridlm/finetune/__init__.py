"""Which parameters a run trains, in what form, and what they begin with."""
