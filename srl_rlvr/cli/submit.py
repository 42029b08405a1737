import argparse
def add_parser(c): return c.add_parser("submit")
def run(o): return 0
