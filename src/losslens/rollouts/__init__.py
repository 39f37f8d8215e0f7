"""Rollouts: sampled once, verified, frozen, and never made twice."""
