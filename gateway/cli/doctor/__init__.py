"""Doctor: judge a running deployment, for `make doctor`. scripts/lib/deployment.sh tells what Docker knows of it on
standard input, one JSON object a line, and gets one check a line: state, name, finding and advice, with tabs between.
"""
