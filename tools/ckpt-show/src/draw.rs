//! The model as text, as a Graphviz graph, and as a drawing.

use std::{collections::BTreeMap, fmt::Write};

use crate::model::{End, Model, Task};

/// A line about a task.
fn headline(task: &Task) -> String {
    let mut line = format!("{} {}", task.pid, task.comm);
    if task.state != "running" {
        let _ = write!(line, " ({})", task.state);
    }
    line
}

fn details(task: &Task) -> String {
    let mut line = format!("group {}, session {}, {} pages", task.pgid, task.sid, task.pages);
    if !task.threads.is_empty() {
        let _ = write!(line, ", {} threads", task.threads.len() + 1);
    }
    line
}

/// The process tree, with threads and descriptors.
#[must_use]
pub fn tree(model: &Model) -> String {
    let rows = model.tree();
    let mut text = String::new();
    for (index, &(depth, task)) in rows.iter().enumerate() {
        // Is there a later row at this depth before one that is shallower?
        let continues = |from: usize, depth: usize| {
            rows.iter().skip(from + 1).map(|&(d, _)| d).take_while(|&d| d >= depth).any(|d| d == depth)
        };
        let mut prefix = String::new();
        for level in 1..depth {
            prefix.push_str(if continues(index, level) { "│  " } else { "   " });
        }
        let (own, below) = match (depth, continues(index, depth)) {
            (0, _) => ("", ""),
            (_, true) => ("├─ ", "│  "),
            (_, false) => ("└─ ", "   "),
        };
        let _ = writeln!(text, "{prefix}{own}{}  [{}]", headline(task), details(task));
        let bar = if continues(index, depth + 1) { "│" } else { " " };
        for (tid, comm) in &task.threads {
            let _ = writeln!(text, "{prefix}{below}{bar}    thread {tid} {comm}");
        }
        for fd in &task.fds {
            let _ = writeln!(text, "{prefix}{below}{bar}    fd {}: {}", fd.fd, fd.what);
        }
    }
    for link in &model.links {
        let to = match &link.to {
            End::Task(pid) => pid.to_string(),
            End::Outside(name) => name.clone(),
        };
        let _ = writeln!(
            text,
            "{} {} {to}  [{}]",
            link.from,
            if link.directed { "->" } else { "--" },
            link.label
        );
    }
    text
}

/// A Graphviz graph: the process tree, and dashed lines for pipes and sockets.
#[must_use]
pub fn dot(model: &Model) -> String {
    let quote = |text: &str| format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
    let mut text = String::from(
        "digraph checkpoint {\n  rankdir=LR;\n  node [shape=box, style=rounded, fontname=\"sans-serif\"];\n",
    );
    for (_, task) in model.tree() {
        let label = format!("{}\n{}", headline(task), details(task));
        // Graphviz wants a line break spelt out.
        let _ = writeln!(text, "  t{} [label={}];", task.pid, quote(&label).replace('\n', "\\n"));
    }
    for (depth, task) in model.tree() {
        if depth > 0 {
            let _ = writeln!(text, "  t{} -> t{} [arrowhead=none];", task.ppid, task.pid);
        }
    }
    let mut outside = BTreeMap::new();
    for link in &model.links {
        let to = match &link.to {
            End::Task(pid) => format!("t{pid}"),
            End::Outside(name) => {
                let number = outside.len();
                let id = *outside.entry(name).or_insert(number);
                let _ = writeln!(text, "  o{id} [label={}, style=dashed];", quote(name));
                format!("o{id}")
            }
        };
        let arrow = if link.directed { "forward" } else { "both" };
        let label = quote(&link.label);
        let _ = writeln!(
            text,
            "  t{} -> {to} [label={label}, style=dashed, color=steelblue, dir={arrow}, constraint=false];",
            link.from
        );
    }
    text.push_str("}\n");
    text
}

/// Between the boxes of two tasks.
const GAP: usize = 18;
const LINE: usize = 13;
const INDENT: usize = 36;
const BOX: usize = 38;

fn xml(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            c if c.is_control() => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

/// Width of a text of the size used, pixels: a generous guess.
fn width(text: &str) -> usize {
    text.chars().count() * 8 + 20
}

/// A drawing: a row for each task, indented under its parent; arcs on the right for pipes and sockets.
#[must_use]
pub fn svg(model: &Model) -> String {
    let rows = model.tree();
    let mut right = BTreeMap::new();
    let mut body = String::new();
    let mut at: BTreeMap<u32, (usize, usize)> = BTreeMap::new();
    // A box has room for the links that begin at it, and their labels beside it.
    let mut heights: BTreeMap<u32, usize> = BTreeMap::new();
    for link in &model.links {
        *heights.entry(link.from).or_insert(8) += LINE;
    }
    let height_of = |pid: u32| heights.get(&pid).map_or(BOX, |&height| height.max(BOX));
    let mut below = 20;
    let box_width = |task: &Task| width(&headline(task)).max(width(&details(task)) * 5 / 6);
    let names = rows.iter().map(|&(depth, task)| 20 + depth * INDENT + box_width(task)).max().unwrap_or(100);
    for &(depth, task) in &rows {
        let (x, y) = (20 + depth * INDENT, below);
        let height = height_of(task.pid);
        below += height + GAP;
        at.insert(task.pid, (x, y));
        right.insert(task.pid, x + box_width(task));
        if let Some(&(px, py)) = at.get(&task.ppid).filter(|_| depth > 0) {
            let (px, py, cy) = (px + 14, py + height_of(task.ppid), y + BOX / 2);
            let _ = writeln!(body, r#"<path class="tree" d="M{px} {py}V{cy}H{x}"/>"#);
        }
        let w = box_width(task);
        let class = if task.state == "running" { "task" } else { "task still" };
        let _ =
            writeln!(body, r#"<rect class="{class}" x="{x}" y="{y}" width="{w}" height="{height}" rx="6"/>"#);
        let _ = writeln!(body, r#"<text x="{}" y="{}">{}</text>"#, x + 10, y + 16, xml(&headline(task)));
        let _ = writeln!(
            body,
            r#"<text class="small" x="{}" y="{}">{}</text>"#,
            x + 10,
            y + 31,
            xml(&details(task))
        );
    }
    let mut far = 0;
    let mut begun: BTreeMap<u32, usize> = BTreeMap::new();
    let mut ended: BTreeMap<u32, usize> = BTreeMap::new();
    let mut outside: BTreeMap<&str, usize> = BTreeMap::new();
    // What leads to one thing outside shares a lane.
    let mut lanes: BTreeMap<&str, usize> = BTreeMap::new();
    let mut free = 0;
    for link in &model.links {
        let mut next = || {
            free += 1;
            free - 1
        };
        let lane = match &link.to {
            End::Outside(name) => *lanes.entry(name).or_insert_with(next),
            End::Task(_) => next(),
        };
        let (Some(&(_, y1)), Some(&x1)) = (at.get(&link.from), right.get(&link.from)) else { continue };
        let (x2, y2) = match &link.to {
            End::Task(pid) => match (at.get(pid), right.get(pid)) {
                (Some(&(_, y)), Some(&x)) => {
                    // Between the lines that begin here.
                    let nth = ended.entry(*pid).or_default();
                    *nth += 1;
                    (x, y + (4 + LINE * (*nth - 1) + LINE) % height_of(*pid))
                }
                _ => continue,
            },
            End::Outside(name) => {
                let y = *outside.entry(name).or_insert_with(|| {
                    let y = below;
                    below += BOX + GAP;
                    let w = width(name);
                    let _ = writeln!(
                        body,
                        r#"<rect class="outside" x="20" y="{y}" width="{w}" height="{BOX}" rx="6"/><text x="30" y="{}">{}</text>"#,
                        y + 23,
                        xml(name)
                    );
                    y
                });
                (20 + width(name), y + BOX / 2)
            }
        };
        let nth = begun.entry(link.from).or_default();
        let (y1, x) = (y1 + 11 + *nth * LINE, names + 24 + lane * 16);
        *nth += 1;
        let arrow = if link.directed { r#" marker-end="url(#arrow)""# } else { "" };
        let _ = writeln!(body, r#"<path class="link" d="M{x1} {y1}H{x}V{y2}H{x2}"{arrow}/>"#);
        let _ = writeln!(body, r#"<circle class="dot" cx="{x}" cy="{y1}" r="3"/>"#);
        far = far.max(x);
    }
    // Labels to the right of all lanes, on the line that they belong to.
    let labels = far + 14;
    let mut used: BTreeMap<u32, usize> = BTreeMap::new();
    let mut width_all = names.max(labels) + 20;
    for link in &model.links {
        let Some(&(_, y)) = at.get(&link.from) else { continue };
        let nth = used.entry(link.from).or_default();
        let y = y + 15 + *nth * LINE;
        *nth += 1;
        below = below.max(y + 20);
        width_all = width_all.max(labels + width(&link.label));
        let _ = writeln!(body, r#"<text class="small" x="{labels}" y="{y}">{}</text>"#, xml(&link.label));
    }
    let height = below + 10;
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{width_all}" height="{height}" viewBox="0 0 {width_all} {height}">
<style>
text {{ font: 13px sans-serif; fill: #222 }} .small {{ font-size: 11px; fill: #666 }}
.task {{ fill: #eef4fb; stroke: #4a7ab0 }} .still {{ fill: #f2f2f2; stroke: #999 }}
.outside {{ fill: none; stroke: #999; stroke-dasharray: 4 3 }}
.tree {{ fill: none; stroke: #999 }} .link {{ fill: none; stroke: #c0662b }} .dot {{ fill: #c0662b }}
</style>
<defs><marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#c0662b"/></marker></defs>
<rect width="100%" height="100%" fill="white"/>
{body}</svg>
"##
    )
}
