"""Work that outlives its request: known, told to stop, waited for, accounted for."""
