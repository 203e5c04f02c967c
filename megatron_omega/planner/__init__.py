"""What a layout costs in memory and time on a described machine, which is best, and how runs compare with it."""
