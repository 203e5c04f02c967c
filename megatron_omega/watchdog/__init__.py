"""Runs that survive: requests to stop, ranks that fail or hang, and one sentence that says who failed where.

    training process                          monitor process beside it             monitor of rank 0
    ----------------                          -------------------------             -----------------
    Guard: signals, errors, Beacon  --->   watches the process, its beacon  -->  Hub: judges all ranks together
    stops or ends when told            <---   dumps stacks, ends the rank      <--  prints the diagnosis, once

A monitor imports no torch and shares no lock with training, so it sees and says what a stuck process cannot.
"""
