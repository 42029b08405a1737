import argparse
def add_parser(c): return c.add_parser("doctor")
def run(o): return 0
