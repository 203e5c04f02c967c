"""Checkpoints that know no layout: saved under any, loaded under any other, verified, never half there."""
