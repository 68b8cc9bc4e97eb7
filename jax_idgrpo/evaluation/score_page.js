"use strict";
const list = document.getElementById("videos");
const videos = Array.from(list.children);
const sort = document.getElementById("sort");
const filter = document.getElementById("filter");
const shown = document.getElementById("shown");
const texts = new Map(videos.map((video) => [video, video.querySelector(".text").textContent.toLowerCase()]));

// Videos without the value, such as those that could not be scored, come first.
function order(name, sign) {
  const value = (video) => (video.dataset[name] === "" ? -Infinity : sign * Number(video.dataset[name]));
  return (a, b) => value(a) - value(b) || Number(a.dataset.number) - Number(b.dataset.number);
}

function update() {
  const [name, sign] = sort.value.split(" ");
  list.append(...videos.sort(order(name, Number(sign))));
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  for (const video of videos) {
    const hit = words.every((word) => texts.get(video).includes(word));
    video.classList.toggle("hidden", !hit);
    count += hit;
  }
  shown.textContent = `${count} of ${videos.length} videos`;
}

sort.addEventListener("change", update);
filter.addEventListener("input", update);
document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
update();
