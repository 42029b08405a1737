import argparse
def add_parser(c): return c.add_parser("eval")
def run(o): return 0
