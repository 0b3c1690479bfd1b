//! How the cost grows: with memory at one process, and with processes at little memory. Both have to grow linearly.
//!
//! The figure for each size is the least of a few rounds, which a busy machine disturbs least. "Per unit" is the cost of
//! what was added since the size before, next to the same for `cp` or for the size before: where it rises,
//! something is not linear. A plot goes to `target/bench/scaling.svg`; `just record scaling` copies it to `docs/`.
//!
//! A size takes twice its room: the process or a copy of its images, and the images. What does not fit is left out. All other
//! memory is held in reserve meanwhile ([`Reserve`]), or the curve would be that of the host of a virtual machine.

use std::{error::Error, fs, path::Path};

use ckpt_tests::{Target, bin_dir};
use plotters::prelude::*;

use crate::{
    harness::{self, Reserve, Tmpfs},
    pages::{Trip, round_trip},
};

const ROUNDS: usize = 3;
const SMALLEST_MIB: u64 = 64;
/// What everything else needs.
const SPARE_MIB: u64 = 1024;
const PROCESSES: [u64; 5] = [1, 25, 50, 100, 200];

/// Seconds at a number of MiB or processes.
struct Point {
    size: f64,
    dump: f64,
    restore: f64,
    cp: f64,
}

/// Up to `mib` MiB of memory, and up to 200 processes.
pub fn run(mib: u64) {
    let dir = Tmpfs::new();
    let room = (harness::available() >> 20).saturating_sub(SPARE_MIB) / 2;
    if room < mib {
        println!("sizes above {room} MiB are left out: memory is short");
    }
    let mib = mib.min(room);
    let reserve = Reserve::new();
    let sizes =
        std::iter::successors(Some(SMALLEST_MIB), |size| Some(size * 2)).take_while(|&size| size <= mib);
    let memory: Vec<Point> =
        sizes.map(|size| measure(&dir, &reserve, size, "memory_hog", &["-", &size.to_string()])).collect();
    table("MiB", &memory);
    let processes: Vec<Point> = PROCESSES
        .into_iter()
        .map(|n| measure(&dir, &reserve, n, "herd", &["-", &n.to_string(), "256"]))
        .collect();
    table("processes", &processes);
    let out = bin_dir().parent().unwrap_or(Path::new(".")).join("bench");
    fs::create_dir_all(&out).expect("make target/bench");
    let file = out.join("scaling.svg");
    plot(&file, &memory, &processes).unwrap_or_else(|e| panic!("draw {}: {e}", file.display()));
    println!("plot: {}", file.display());
}

/// `size` in the unit of its table.
fn measure(dir: &Tmpfs, reserve: &Reserve, size: u64, workload: &str, args: &[&str]) -> Point {
    let target = Target::start_with(workload, args);
    let trips: Vec<Trip> =
        (0..ROUNDS).map(|_| round_trip(&target, dir, || reserve.fill(), None, || ())).collect();
    let least = |time: fn(&Trip) -> f64| trips.iter().map(time).fold(f64::MAX, f64::min);
    let point = Point {
        size: f64::from(u32::try_from(size).expect("a small number")),
        dump: least(|t| t.dump.as_secs_f64()),
        restore: least(|t| t.restore.as_secs_f64()),
        cp: least(|t| t.cp.as_secs_f64()),
    };
    eprintln!("{size}: dump {:.3} s, restore {:.3} s, cp {:.3} s", point.dump, point.restore, point.cp);
    point
}

fn table(unit: &str, points: &[Point]) {
    println!(
        "{unit:>10} {:>9} {:>11} {:>9} {:>11} {:>9}",
        "dump s", "ms per unit", "restore s", "ms per unit", "cp s"
    );
    let mut before: Option<&Point> = None;
    for point in points {
        let added = |time: fn(&Point) -> f64| {
            before.map_or("-".to_owned(), |b| {
                format!("{:.3}", (time(point) - time(b)) / (point.size - b.size) * 1000.0)
            })
        };
        println!(
            "{:>10} {:>9.3} {:>11} {:>9.3} {:>11} {:>9.3}",
            point.size,
            point.dump,
            added(|p| p.dump),
            point.restore,
            added(|p| p.restore),
            point.cp
        );
        before = Some(point);
    }
}

fn plot(file: &Path, memory: &[Point], processes: &[Point]) -> Result<(), Box<dyn Error>> {
    let root = SVGBackend::new(file, (960, 400)).into_drawing_area();
    root.fill(&WHITE)?;
    let (left, right) = root.split_horizontally(480);
    panel(&left, "one process, by memory", "MiB", memory, true)?;
    panel(&right, "256 KiB each, by number of processes", "processes", processes, false)?;
    root.present()?;
    Ok(())
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Line = (&'static str, RGBColor, fn(&Point) -> f64);

fn panel(
    area: &Area,
    title: &str,
    unit: &str,
    points: &[Point],
    with_cp: bool,
) -> Result<(), Box<dyn Error>> {
    const LINES: [Line; 3] = [
        ("dump", RGBColor(200, 60, 40), |p| p.dump),
        ("restore", RGBColor(40, 90, 180), |p| p.restore),
        ("cp", RGBColor(120, 120, 120), |p| p.cp),
    ];
    let lines = if with_cp { &LINES[..] } else { &LINES[..2] };
    let most = points.iter().map(|p| p.size).fold(0.0, f64::max);
    let longest = lines.iter().flat_map(|(_, _, time)| points.iter().map(time)).fold(0.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 16))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(48)
        .build_cartesian_2d(0.0..most * 1.05, 0.0..longest * 1.1)?;
    chart.configure_mesh().light_line_style(WHITE).x_labels(6).x_desc(unit).y_desc("seconds").draw()?;
    for &(name, color, time) in lines {
        let series = points.iter().map(|p| (p.size, time(p)));
        chart
            .draw_series(LineSeries::new(series.clone(), color.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
        chart.draw_series(series.map(|at| Circle::new(at, 3, color.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.filled())
        .draw()?;
    Ok(())
}
