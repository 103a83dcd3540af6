// One confirm dialog for the whole page: it stands outside the parts that are polled, so polling never wipes it.
document.addEventListener("click", (event) => {
  const stop = event.target.closest("[data-stop]");
  const dialog = document.getElementById("confirm");
  if (stop && dialog) {
    dialog.querySelector("form").action = stop.dataset.stop;
    dialog.showModal();
  } else if (event.target.closest("[data-close]")) {
    dialog.close();
  }
});
