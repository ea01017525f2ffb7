//! Writes a seed for each golden vector, so that fuzzing begins at messages that mean something: seeds VECTORS OUT.

use std::path::Path;

use serde_json::Value;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let (vectors, out) = (Path::new(&args[1]), Path::new(&args[2]));
    let load = |name: &str| -> Value {
        serde_json::from_str(&std::fs::read_to_string(vectors.join(name)).unwrap()).unwrap()
    };
    let mut seeds: Vec<Vec<u8>> = Vec::new();
    let messages = load("messages.json");
    for v in ["good", "bad"].iter().flat_map(|k| messages[*k].as_array().unwrap()) {
        // the number that the fuzz body makes about this shape of
        let shape = match v["shape"]["input"].as_array().unwrap().len() {
            0 => 0,
            1 => v["shape"]["input"][0][2].as_u64().unwrap() as u8,
            _ => 0xCA,
        };
        let bytes = hex(&v["hex"]);
        seeds.push([&[0, shape], &bytes[..]].concat());
        // terms: what they say of rows, alone
        if [1, 2, 6].contains(bytes.first().unwrap_or(&0)) && bytes.len() > 240 {
            seeds.push([&[7, bytes[233], bytes[234], bytes[232], 8], &bytes[240..]].concat());
        }
    }
    // whole conversations, as each side hears them, in each state
    for v in load("transcripts.json").as_array().unwrap() {
        for (from, role) in [("host", 1u8), ("worker", 0)] {
            let heard: Vec<u8> = v["messages"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|m| m["from"] == from)
                .flat_map(|m| hex(&m["plain"]))
                .collect();
            for state in 0..4 {
                seeds.push([&[2, role | state << 2, 0], &heard[..]].concat());
            }
            seeds.push([&[2, role | 2 | 2 << 2, 0], &heard[..]].concat());
        }
        seeds.push([&[3], &hex(&v["first_flight"])[..]].concat());
        seeds.push([&[4], &hex(&v["greeting"])[..], &hex(&v["answer"])].concat());
    }
    let noise = load("noise.json");
    for v in noise["refused_by_worker"].as_array().unwrap() {
        seeds.push([&[3], &hex(&v["bytes"])[..]].concat());
    }
    for v in noise["refused_by_host"].as_array().unwrap() {
        seeds.push([&[4], &hex(&v["bytes"])[..]].concat());
    }
    for v in load("frames.json")["refused"].as_array().unwrap() {
        seeds.push([&[1, 0, 16], &hex(&v["stream"])[..]].concat());
    }
    seeds.push(vec![5, 0, 0, 0, 8, 0, 0, 8, 4, 1, 0, 1, 0, 2, 0, 3, 0, 128, 0, 3, 2, 3, 0, 0, 0]);
    for v in load("keys.json")["codes"].as_array().unwrap() {
        seeds.push([&[6], v["shown"].as_str().unwrap().as_bytes()].concat());
    }
    std::fs::create_dir_all(out).unwrap();
    for (n, seed) in seeds.iter().enumerate() {
        std::fs::write(out.join(format!("{n:03}")), seed).unwrap();
    }
}

fn hex(v: &Value) -> Vec<u8> {
    let digits = v.as_str().unwrap_or("").as_bytes();
    digits.chunks(2).map(|d| u8::from_str_radix(std::str::from_utf8(d).unwrap(), 16).unwrap()).collect()
}
