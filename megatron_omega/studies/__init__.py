"""Studies around a run: measuring the machine, rehearsing a plan, proving that layouts agree."""
