"""Fleets of servers: conversations that move, hosts that fail, how many fit."""
