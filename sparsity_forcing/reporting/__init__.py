"""The report: what was measured, drawn and written down for a manager and an engineer (needs the `pipeline` extra).

`inputs` reads what the stages before left, `kept` and `efficiency` measure what only the report needs, `plots` and
`overlays` draw, `content` decides what is said, `page` and `markdown` write it.
"""
