import argparse
def add_parser(c): return c.add_parser("predict")
def run(o): return 0
