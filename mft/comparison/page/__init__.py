"""The parts of the HTML report; `mft.comparison.report` puts them together.

`summary` is the first screen, `facts` says on what the runs stand. `table` is what a table is, `ranked` and
`by_task` are the two large ones. `svg` turns a drawing of matplotlib into a picture inside the page;
`curves`, `differences`, `tested`, `costs`, `keys` and `search` draw, each of them a `Section` of pictures, or
None where a picture would say nothing. `report.html`, `report.css` and `sort.js` are the page around them.

Text of runs reaches the page in two ways only, both safe: by Jinja2 with autoescape, and as the text of an
SVG that is parsed and written again. Nothing of it becomes markup, a style or a script, and the policy in the
head of the page would not run it.
"""
